# What every training of a matcher shares; recipes in this folder inherit from it.
seed = 2022
resume = True
export = "matcher"
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20),
    checkpoint=dict(
        type="CheckpointHook", interval=1, max_keep_ckpts=1, save_best="pck-0.10", rule="greater"
    ),
)
custom_hooks = [dict(type="TellEpoch"), dict(type="RecordCurve"), dict(type="ShowProgress")]
log_level = "WARNING"
randomness = dict(seed=seed)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="collate_pairs"),
    dataset=dict(
        type="TrainingPairs",
        dataset=dict(type="spair", split="trn"),
        side_px=256,
        augmentation=dict(colour=0.2, crop=0.5),
        seed=seed,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="list_pairs"),
    dataset=dict(type="nemf.spair", split="val"),
)
val_evaluator = []
val_cfg = dict(type="ValidatePCK", protocol="canonical@1", pairs=None)
