label = "nearest, small CNN layer3.1"
model = dict(type="nearest", backbone="resnet_small", weights="{{ fileDirname }}/../../weights/resnet_small.pth", layers=(6,), input_size=256)
batch = 8
