from .scheduling_flow_map import FlowMapScheduler
from .scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .scheduling_flow_match_sde_multistep import FlowMatchSDEMultistepScheduler


__all__ = ["FlowMapScheduler", "FlowMatchEulerMaruyamaScheduler", "FlowMatchSDEMultistepScheduler"]
