"""What is measured of a layer with the loss L = Σ hs · g."""

FORWARD = "forward"  # hs
BACKWARD = "forward+backward"  # the gradient in weights and inputs; for ids in the weights
BACKWARD_ALONE = "backward alone"  # the same gradient, from what a forward pass has kept
PARAMETERS = "parameters only"  # the gradient in the weights
JVP = "jvp"  # the tangent of hs in one direction of weights and inputs
HVP = "Hessian-vector product"  # the Hessian in the weights times one direction
MEASURES = (FORWARD, BACKWARD, PARAMETERS, JVP, HVP)
COUNTED = (FORWARD, BACKWARD, PARAMETERS)  # whose matrix products the roofline counts
