"""Keys of Self-Forcing's, Causal-Forcing's and PackForcing's YAML files and what they are called here ("": nothing is).

docs/other_configs.md has the same for readers, and the flags of the command lines.
"""

_THEIRS = {  # what there is here -> their keys for it
    "model.checkpoint": "generator_ckpt",
    "dmd.teacher": "real_name",
    "dmd.critic": "fake_name",
    "train.stage": "trainer distribution_loss teacher_forcing generator_task",
    "sampler.steps": "denoising_step_list",
    "sampler.warp": "warp_denoising_step",
    "train.shift, sampler.shift and dmd.score_shift": "timestep_shift model_kwargs.timestep_shift",
    "dmd.guidance, consistency.guidance or ode.guidance; sampler.guidance in inference": "guidance_scale",
    "dmd.min_timestep and dmd.max_timestep": "ts_schedule ts_schedule_max",
    "dmd.critic_updates": "dfake_gen_update_ratio",
    "consistency.grid_steps": "discrete_cd_N",
    "sampler.context_timestep": "context_noise",
    "sampler.negative_prompt": "negative_prompt",
    "video.frames_per_chunk": "num_frame_per_block",
    "video.trained_frames": "num_training_frames",
    "video.height, video.width and video.trained_frames": "image_or_video_shape",
    "data.path in training, inference.data_path in inference": "data_path",
    "data.kind": "load_raw_video",
    "train.batch_size": "batch_size",
    "train.gradient_accumulation": "grad_accum",
    "train.total_batch_size": "total_batch_size",
    "train.optimizer.lr": "lr",
    "train.optimizer.betas": "beta1 beta2",
    "train.optimizer.weight_decay": "weight_decay",
    "dmd.critic_optimizer.lr": "lr_critic",
    "dmd.critic_optimizer.betas": "beta1_critic beta2_critic",
    "train.ema_decay": "ema_weight",
    "train.ema_start_step": "ema_start_step",
    "train.mixed_precision": "mixed_precision",
    "train.gradient_checkpointing": "gradient_checkpointing",
    "train.checkpoint_every": "log_iters",
    "train.sharding": (
        "sharding_strategy generator_fsdp_wrap_strategy real_score_fsdp_wrap_strategy fake_score_fsdp_wrap_strategy"
    ),
    "train.sharding and train.text_placement": "text_encoder_fsdp_wrap_strategy",
    "train.text_placement": "text_encoder_cpu_offload",
    "train.project": "wandb_project",
    "train.logdir": "wandb_name",
    "the environment's WANDB_BASE_URL": "wandb_host",
    "the environment's WANDB_API_KEY": "wandb_key",
    "the environment's WANDB_ENTITY": "wandb_entity",
    "model.bundle": "model_kwargs.model_name",
    "cache.kind": "model_kwargs.pack_enable model_kwargs.pc_enable",
    "cache.sink": "model_kwargs.pack_sink_blocks",
    "cache.recent": "model_kwargs.pack_recent_blocks",
    "cache.mid_capacity": "model_kwargs.pack_mid_bank_capacity_blocks",
    "cache.top_k": "model_kwargs.pack_mid_select_topk_blocks model_kwargs.budget",
    "cache.selection": "model_kwargs.pack_mid_selection_mode",
    "cache.compressor.kind": "model_kwargs.pack_compress_mode",
    "cache.temporal": "model_kwargs.pack_enable_rope_adjustment model_kwargs.pc_mid_rope_unification",
    "cache.kind and cache.recent": "model_kwargs.local_attn_size",
    "cache.sink with cache.unit=frames": "model_kwargs.sink_size",
    "cache.recent with cache.unit=frames": "model_kwargs.recent",
    "it is always so": (
        "denoising_loss_type num_train_timestep causal is_causal same_step_across_blocks generator_grad "
        "model_kwargs.pack_compressor_detach_inputs"
    ),
    "": (
        "spatial_sf last_step_only independent_first_frame discriminator_lr_multiplier gc_interval "
        "model_kwargs.pc_bootstrap_delta"
    ),
}
OURS = {theirs: ours for ours, keys in _THEIRS.items() for theirs in keys.split()}
