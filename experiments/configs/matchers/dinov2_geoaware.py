label = "DINOv2 ViT-B/14, as GeoAware-SC reads it"
model = dict(type="dinov2_nn", backbone="dinov2_vitb14", readout="geoaware", input_size=840)
batch = 8
