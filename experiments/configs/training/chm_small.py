# A small CHM for the synthetic job.
_base_ = "_pairs.py"
epochs = 4  # of 300 pairs
model = dict(
    type="MatcherTraining",
    pairs_at_once=4,
    matcher=dict(
        type="chm",
        backbone="resnet_small",
        backbone_weights="{{ fileDirname }}/../../weights/resnet_small.pth",
        init="head",
        input_size=160,
    ),
)
train_dataloader = dict(
    batch_size=8, dataset=dict(side_px=160, pairs_per_epoch=300, augmentation=None)
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
val_cfg = dict(pairs=60)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
