# A small CATs++ for the synthetic job: two levels of 16 and 32 cells.
_base_ = "cats_small.py"
epochs = 4  # of 300 pairs
model = dict(
    matcher=dict(
        _delete_=True,
        type="catspp",
        backbone="resnet_small",
        backbone_weights="{{ fileDirname }}/../../weights/resnet_small.pth",
        init="head",
        layers=(3, 4, 5, 6),
        affinity_dim=32,
        query_dim=128,
        input_size=256,
    ),
)
val_cfg = dict(pairs=60)
train_cfg = dict(max_epochs=epochs, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", begin=1, end=epochs, eta_min=1e-6, convert_to_iter_based=True),
]
