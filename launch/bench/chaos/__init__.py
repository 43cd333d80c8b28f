"""`python -m launch.bench chaos`: a server under traffic and faults, whose every answer is compared with a calm one."""
