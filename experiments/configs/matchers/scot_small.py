label = "SCOT without class maps, small CNN (4,6)"
model = dict(type="scot", backbone="resnet_small", weights="{{ fileDirname }}/../../weights/resnet_small.pth", layers=(4, 6), exponent=0.5, classmap=False)
batch = 8
