base = "configs/addition_base.py"
