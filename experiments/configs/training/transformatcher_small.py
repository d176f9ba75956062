# A small TransforMatcher for the synthetic job: four layers, three blocks.
_base_ = "_pairs.py"
epochs = 12  # of 300 pairs
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
    ),
)
train_dataloader = dict(
    batch_size=8, dataset=dict(side_px=160, pairs_per_epoch=300, augmentation=None)
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=2)
val_cfg = dict(pairs=60)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
