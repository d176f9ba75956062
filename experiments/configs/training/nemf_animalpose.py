# NeMF on AnimalPose, ResNet-18 to layer3: sized for CPU cores (a pass of 6,000 pairs: 45 minutes).
_base_ = "cats_animalpose.py"
epochs = 12  # of 1,000 pairs
model = dict(
    matcher=dict(
        _delete_=True,
        type="nemf",
        backbone="resnet18",
        init="head",
        layers=(4, 6),
        proj_dim=32,
        mlp_ratio=2,
        level_channels=4,
        field_width=128,
    ),
)
val_cfg = dict(pairs=100)
train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(optimizer=dict(lr=7e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, end=epochs, eta_min=1e-6, convert_to_iter_based=True),
]
