"""What runs in a worker's process: one model on one device mask, on a Unix socket, in llama-server's dialect.

Nothing here imports the service, and the service imports nothing heavy from here: an engine's library is loaded inside
`main`, in the child, so that its crash (SIGABRT, CUDA error) costs one replica and no more (HP-PLC-7).
"""
