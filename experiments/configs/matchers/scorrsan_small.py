label = "SCorrSAN, small CNN (trained, too)"
recipe = "scorrsan_small"  # trained by `nemf train scorrsan_small`
model = dict(type="scorrsan", backbone="resnet_small")
batch = 8
