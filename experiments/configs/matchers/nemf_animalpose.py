label = "NeMF, ResNet-18 (4,6), trained on AnimalPose"
recipe = "nemf_animalpose"  # trained by `nemf train nemf_animalpose`
model = dict(type="nemf", backbone="resnet18", layers=(4, 6))
batch = 1
