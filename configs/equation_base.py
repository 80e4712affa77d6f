# python train_base.py configs/equation_base.py
task = "linear_equation_solving"
