label = "HPF, small CNN (4,6)"
model = dict(type="hpf", backbone="resnet_small", weights="{{ fileDirname }}/../../weights/resnet_small.pth", layers=(4, 6))
batch = 8
