# SCorrSAN on SPair-71k, two networks that teach each other from the fifth epoch on; a GPU.
_base_ = "_pairs.py"
epochs = 150
model = dict(
    type="MatcherTraining",
    pairs_at_once=4,
    matcher=dict(
        type="scorrsan",
        backbone="resnet101",
        init="head",
        train_trunk=True,
        teaching=dict(first_epoch=4, weight=10, first_share=0.2, last_share=0.9, ramp_epochs=10),
    ),
)
train_dataloader = dict(batch_size=16, num_workers=8, drop_last=True)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-5, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(feature_extraction=dict(lr_mult=0.1))),
)
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
