label = "MMNet, FCN-ResNet-101"
checkpoints = dict(  # the authors' files, as they name them; both are on this trunk
    spair="mmnet/ckp_spair_fcnres101.pth",
    pfpascal="mmnet/ckp_pascal_fcnres101.pth",
    pfwillow="mmnet/ckp_pascal_fcnres101.pth",
)
model = dict(type="mmnet", backbone="fcn_resnet101")
batch = 1  # pairs are matched one by one
