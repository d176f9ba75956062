# A small SCorrSAN for the synthetic job, a 32x32 flow; the two networks teach each other from the
# fourth epoch on.
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
        teaching=dict(first_epoch=3, ramp_epochs=4),
    ),
)
train_dataloader = dict(batch_size=8, dataset=dict(pairs_per_epoch=300))
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
val_cfg = dict(pairs=60)
optim_wrapper = dict(
    type="AutocastOptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05)
)
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
