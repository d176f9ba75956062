# A small TransforMatcher for the synthetic job: four layers, three blocks. Both trunks learn as fast
# as the rest: a match attends to sums over all others only, so what improves is the features.
_base_ = "_pairs.py"
epochs = 8  # of 300 pairs
model = dict(
    type="MatcherTraining",
    pairs_at_once=4,
    matcher=dict(
        type="transformatcher",
        backbone="resnet_small",
        backbone_weights="{{ fileDirname }}/../../weights/resnet_small.pth",
        init="head",
        layers=(3, 4, 5, 6),
        depth=3,
        input_size=160,
        train_trunk=True,
    ),
)
train_dataloader = dict(
    batch_size=8, dataset=dict(side_px=160, pairs_per_epoch=300, augmentation=None)
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=2)
val_cfg = dict(pairs=60)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="Adam", lr=1e-3),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, end=epochs, eta_min=1e-6, convert_to_iter_based=True),
]
