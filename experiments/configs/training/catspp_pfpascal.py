# CATs++ on PF-PASCAL; these weights are also the ones evaluated on PF-WILLOW.
_base_ = "catspp_spair.py"
train_dataloader = dict(dataset=dict(dataset=dict(type="pfpascal", split="trn")))
val_dataloader = dict(dataset=dict(type="nemf.pfpascal", split="val"))
