from .cells import split_cells as split_cells
from .errors import AnalysisError as AnalysisError
from .fits.allocation import fit_allocation as fit_allocation
from .fits.allocation_result import AllocationFit as AllocationFit
from .fits.data_constrained import (
    DataConstrainedFit as DataConstrainedFit,
)
from .fits.data_constrained import (
    fit_data_constrained as fit_data_constrained,
)
from .fits.density import fit_density as fit_density
from .fits.isoflop import fit_isoflop as fit_isoflop
from .fits.isoflop_result import IsoflopFit as IsoflopFit
from .fits.joint import fit_joint as fit_joint
from .fits.joint_result import JointFit as JointFit
from .fits.ladder import fit_ladder as fit_ladder
from .fits.log_log import LogLogFit as LogLogFit
from .fits.log_log import fit_log_log as fit_log_log
from .fits.moe_joint import MoeJointFit as MoeJointFit
from .fits.moe_joint import fit_moe_joint as fit_moe_joint
from .fits.power_law import (
    PowerFit as PowerFit,
)
from .fits.power_law import (
    fit_power as fit_power,
)
from .fits.precision import PrecisionFit as PrecisionFit
from .fits.precision import fit_precision as fit_precision
from .fits.routing import RoutingFit as RoutingFit
from .fits.routing import fit_routing as fit_routing
from .fits.scaling import fit_scaling as fit_scaling
from .fits.scaling_result import ScalingFit as ScalingFit
from .fits.simplex import fit_simplex as fit_simplex
from .fits.simplex_result import SimplexFit as SimplexFit
from .fits.slots import fit_slots as fit_slots
from .fits.slots_result import SlotsFit as SlotsFit
from .fits.surface import (
    SurfaceFit as SurfaceFit,
)
from .fits.surface import (
    fit_surface as fit_surface,
)
from .fits.types import Estimate as Estimate
from .fits.types import Fit as Fit
from .index import write_index as write_index
from .reader import read_table as read_table
from .report import summarize as summarize
from .report import write_report as write_report
from .results import Results as Results
from .status import Status as Status
from .table import (
    average_differences as average_differences,
)
from .table import (
    format_table as format_table,
)
from .table import (
    load_curves as load_curves,
)
from .table import (
    load_sequence_losses as load_sequence_losses,
)
from .table import (
    load_trials as load_trials,
)
from .table import (
    paired_differences as paired_differences,
)
