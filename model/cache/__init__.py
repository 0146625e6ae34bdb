from model.cache import deep_forcing as deep_forcing  # registers itself
