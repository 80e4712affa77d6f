base = "configs/base_conversion_base.py"
