# The NeMF of the regression gate, weights in experiments/weights: small before good.
_base_ = "nemf_small.py"
epochs = 8  # of 300 pairs
export_half = True
model = dict(
    matcher=dict(layers=(4,), feature_size=8, proj_dim=8, mlp_ratio=1, field_width=32)
)
train_cfg = dict(max_epochs=epochs, val_interval=2)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    # the last two epochs at the lowest rate
    dict(type="CosineAnnealingLR", begin=1, end=6, eta_min=1e-6, convert_to_iter_based=True),
]
