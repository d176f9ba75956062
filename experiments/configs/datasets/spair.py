dataset = dict(type="spair", split="test")
