"""What this machine computes with: cards through the driver, the CPU, and declared (simulated) devices."""
