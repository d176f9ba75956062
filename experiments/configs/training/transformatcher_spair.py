# TransforMatcher on SPair-71k as its code trains it, the trunks at a hundredth of the rate; a GPU.
_base_ = "_pairs.py"
epochs = 10
model = dict(
    type="MatcherTraining",
    pairs_at_once=4,
    matcher=dict(type="transformatcher", backbone="resnet101", init="head", train_trunk=True),
)
train_dataloader = dict(
    batch_size=16, num_workers=8, drop_last=True, dataset=dict(side_px=240)
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="Adam", lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.01))),
)
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
