# A small CATs for the synthetic job: minutes on two cores.
_base_ = "_pairs.py"
epochs = 12  # of 300 pairs
model = dict(
    type="MatcherTraining",
    pairs_at_once=8,
    matcher=dict(
        type="cats",
        backbone="resnet_small",
        backbone_weights="{{ fileDirname }}/../../weights/resnet_small.pth",
        init="head",
        layers=(4, 6),
        proj_dim=32,
        mlp_ratio=2,
    ),
)
train_dataloader = dict(batch_size=8, dataset=dict(pairs_per_epoch=300))
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=4)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, end=epochs, eta_min=1e-6, convert_to_iter_based=True),
]
