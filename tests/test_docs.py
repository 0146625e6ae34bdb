"""What the pages point at is there, and what they list is what the code knows."""

import re
from pathlib import Path

import pytest

from pipeline.text import EOS, PAD, UNKNOWN, sprite_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bundles" / "tiny" / "TRAINING.md"]


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_configs_and_scripts_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert section in map(anchor, headings), link
    there = re.sub(r"^.* (is|are) gone\b.*$", "", text, flags=re.M)  # a changelog names what it removes
    for config in re.findall(r"configs/[\w/]+\.yaml", there):
        assert (ROOT / config).is_file(), config
    for script in re.findall(r"-m scripts\.(\w+)", text):
        assert script == "NAME" or (ROOT / "scripts" / f"{script}.py").is_file(), script


def test_the_small_models_vocabulary_is_on_its_page():
    text = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8").partition("## What the small model knows")[2]
    table = text.partition("A word outside")[0]
    vocabulary = set(sprite_tokenizer().get_vocab()) - {PAD, EOS, UNKNOWN}
    assert vocabulary <= set(re.findall(r"[a-z]+", table))
    assert f"[{len(vocabulary)} words]" in (ROOT / "README.md").read_text(encoding="utf-8")
