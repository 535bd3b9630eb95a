"""Makes ``experts_implementation="ktlib"`` known to transformers: the function that computes experts, and the loading.

Importing this module does it, now or when transformers' modules are first imported.
"""

import importlib.machinery
import sys

from ktlib.integrations.transformers_experts import IMPLEMENTATION, INTERFACE, experts_forward, keep_out_of_graphs

_LOADING = "transformers.modeling_utils"


class _OnImport:
    """Calls ``action(module)`` when the module ``name`` was imported, so that ``import ktlib`` need not import it.

    The import of transformers takes 1.5 s.
    """

    def __init__(self, name, action):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def execute_and_act(module):
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act
        return spec


def _register_function(interface):
    interface.ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    keep_out_of_graphs()


def _map_checkpoints(modeling_utils):
    from ktlib.integrations.mapped_experts import install  # here, because it imports transformers

    install(modeling_utils)


def _register():
    for name, action in ((INTERFACE, _register_function), (_LOADING, _map_checkpoints)):
        if name in sys.modules:
            action(sys.modules[name])
        else:
            sys.meta_path.insert(0, _OnImport(name, action))


_register()
