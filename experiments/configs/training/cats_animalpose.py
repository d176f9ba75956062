# CATs on AnimalPose, ResNet-18 to layer3: sized for CPU cores (a pass of 6,000 pairs: 20 minutes).
_base_ = "_pairs.py"
epochs = 18  # of 1,000 pairs
model = dict(
    type="MatcherTraining",
    pairs_at_once=8,
    matcher=dict(
        type="cats", backbone="resnet18", init="head", layers=(4, 6), proj_dim=32, mlp_ratio=2
    ),
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        dataset=dict(type="animalpose", split="trn"),
        pairs_per_epoch=1000,
        augmentation=dict(colour=0.2, crop=0.5, mirror=0.5),
    ),
)
val_dataloader = dict(dataset=dict(type="nemf.animalpose", split="val"))
val_cfg = dict(pairs=250)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
optim_wrapper = dict(
    type="AutocastOptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, end=epochs, eta_min=1e-6, convert_to_iter_based=True),
]
