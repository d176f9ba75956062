# A small SCorrSAN for the synthetic job, a 32x32 flow; the two networks teach each other from the
# fifth epoch on. Frozen, the trunk would leave nothing to learn: the encoder only sees its map.
_base_ = "_pairs.py"
epochs = 8  # of 300 pairs
model = dict(
    type="MatcherTraining",
    pairs_at_once=4,
    matcher=dict(
        type="scorrsan",
        backbone="resnet_small",
        backbone_weights="{{ fileDirname }}/../../weights/resnet_small.pth",
        init="head",
        width=192,
        feature_size=32,
        train_trunk=True,
        teaching=dict(first_epoch=4, ramp_epochs=4),
    ),
)
train_dataloader = dict(batch_size=8, dataset=dict(pairs_per_epoch=300))
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=2)
val_cfg = dict(pairs=60)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(feature_extraction=dict(lr_mult=0.3))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, end=epochs, eta_min=1e-6, convert_to_iter_based=True),
]
