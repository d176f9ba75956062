dataset = dict(type="pfwillow", split="test")
