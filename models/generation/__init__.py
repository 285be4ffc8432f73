"""Images from text: VAE, GAN, diffusion."""
