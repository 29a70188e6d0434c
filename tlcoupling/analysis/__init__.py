"""Everything that is measured on one model, in one call.

``analyze`` measures one prompt and ``many`` several, with intervals; ``summary`` reduces an analysis to the few numbers
that the terminal, the report page and a sweep's table show. ``checking`` holds a model's Jacobians against autograd and
``estimate`` says what a call would take.
"""
