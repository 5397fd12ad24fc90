"""A convolution with the norm before it and the additions after it in one call."""
