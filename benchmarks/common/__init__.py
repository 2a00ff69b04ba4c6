"""What the commands share: peers, samplers, known flows, and the measuring and reporting of it."""
