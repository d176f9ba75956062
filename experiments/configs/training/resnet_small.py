# The small CNN of the synthetic job: classify rendered objects (see experiments/classification.py).
seed = 2022
side_px = 112
batch_size = 64
epochs = 40
resume = True
export = "backbone"
model = dict(type="BackboneClassifier", backbone="resnet_small", n_classes=10)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="RenderedObjects", per_class=500, split="trn", side_px=side_px, augment=True),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="RenderedObjects", per_class=50, split="val", side_px=side_px, augment=False),
)
val_evaluator = dict(type="TopOne")
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=2, end=epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
custom_hooks = [dict(type="TellEpoch"), dict(type="RecordCurve"), dict(type="ShowProgress")]
log_level = "WARNING"
randomness = dict(seed=seed)
