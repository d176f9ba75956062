# NeMF on SPair-71k. The paper gives no schedule: CATs' (see docs/training.md); a GPU.
_base_ = "cats_spair.py"
model = dict(
    pairs_at_once=4,
    matcher=dict(
        _delete_=True,
        type="nemf",
        backbone="resnet101",
        init="head",
        layers=(3, 7, 30, 33),
        training=dict(candidates=100),
    ),
)
train_dataloader = dict(dataset=dict(side_px=512))
val_cfg = dict(pairs=500)
