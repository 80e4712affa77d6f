# python train_base.py configs/equation_missing_base.py
# divide-then-subtract never occurs where the factor is large
task = "linear_equation_solving"
strategy_weights = {"small factor": [0.4, 0.4, 0.2], "large factor": [0.5, 0, 0.5]}
