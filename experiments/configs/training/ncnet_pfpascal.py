# NC-Net on PF-PASCAL as its code trains it: pairs without keypoints, frozen trunk; a GPU.
_base_ = "_pairs.py"
seed = 1
epochs = 5
model = dict(
    type="MatcherTraining",
    pairs_at_once=4,
    matcher=dict(type="ncnet", backbone="resnet101", init="head"),
)
randomness = dict(seed=seed)
train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    drop_last=True,  # a lone pair has no other one to be compared with
    dataset=dict(
        dataset=dict(type="pfpascal", split="trn"), side_px=400, augmentation=None, seed=seed
    ),
)
val_dataloader = dict(dataset=dict(type="nemf.pfpascal", split="val"))
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=5e-4))
default_hooks = dict(checkpoint=dict(save_param_scheduler=False))  # the rate is constant
