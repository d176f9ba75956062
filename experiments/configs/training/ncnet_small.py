# A small NC-Net for the synthetic job, learning from pairs without keypoints.
_base_ = "_pairs.py"
epochs = 4  # of 300 pairs
model = dict(
    type="MatcherTraining",
    pairs_at_once=8,
    matcher=dict(
        type="ncnet",
        backbone="resnet_small",
        backbone_weights="{{ fileDirname }}/../../weights/resnet_small.pth",
        init="head",
        kernel_sizes=(3, 3),
        channels=(16, 1),
        input_size=256,
    ),
)
train_dataloader = dict(
    batch_size=8, drop_last=True, dataset=dict(pairs_per_epoch=300, augmentation=None)
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
val_cfg = dict(pairs=60)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3))
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
