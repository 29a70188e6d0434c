"""Everything that is measured on one model, in one call.

``analyze`` measures one prompt and ``many`` several, with confidence intervals. ``summary`` reduces an analysis to the
few numbers in the terminal, the report page and a sweep's table. ``checking`` compares a model's Jacobians with
autograd, and ``estimate`` predicts the cost of a call.
"""
