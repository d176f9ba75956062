# CATs on SPair-71k as its code trains it (frozen trunk); a GPU.
_base_ = "_pairs.py"
seed = 2021
epochs = 100
model = dict(
    type="MatcherTraining",
    pairs_at_once=32,
    matcher=dict(
        type="cats", backbone="resnet101", init="head", layers=(0, 8, 20, 21, 26, 28, 29, 30)
    ),
)
randomness = dict(seed=seed)
train_dataloader = dict(batch_size=32, num_workers=8, drop_last=True, dataset=dict(seed=seed))
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-5, weight_decay=0.05),
    # The trunk learns at a tenth of the rate where model.matcher.train_trunk=True.
    paramwise_cfg=dict(custom_keys=dict(feature_extraction=dict(lr_mult=0.1))),
)
param_scheduler = [dict(type="MultiStepLR", milestones=[70, 80, 90], gamma=0.5)]
