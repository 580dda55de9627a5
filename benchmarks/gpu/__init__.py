"""What one CUDA card says of autorev, by one command: python -m benchmarks.gpu"""
