label = "copy (floor)"
model = dict(type="copy")
batch = 8
