# CATs++ on SPair-71k as its code trains it, the trunk at a hundredth of the rate; a GPU.
_base_ = "cats_spair.py"
model = dict(
    pairs_at_once=2,
    matcher=dict(
        _delete_=True, type="catspp", backbone="resnet101", init="head", train_trunk=True
    ),
)
train_dataloader = dict(dataset=dict(side_px=512))
optim_wrapper = dict(
    optimizer=dict(lr=3e-4),
    paramwise_cfg=dict(_delete_=True, custom_keys=dict(backbone=dict(lr_mult=0.01))),
)
