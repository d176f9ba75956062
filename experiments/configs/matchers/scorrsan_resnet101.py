label = "SCorrSAN, ResNet-101"
recipe = "scorrsan_spair"  # `nemf train scorrsan_spair`; no weights are published
model = dict(type="scorrsan", backbone="resnet101")
batch = 8
