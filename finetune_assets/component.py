"""A recipe's chain as a Dagster component, for other Dagster projects: `type: finetune_assets.FinetuneRecipe`."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg

from finetune_assets.assets.automation.chain import recipe_definitions
from finetune_assets.assets.automation.sensors import observe_one_sensor
from finetune_assets.assets.automation.sources import dataset_nodes
from finetune_assets.assets.keys import Mount, stem
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.file import load_recipe, recipe_of, refuse_rivals, renamed
from finetune_assets.recipe.project import Project, state_folder
from finetune_assets.reporting.errors import BadInput
from finetune_assets.reporting.masking import mask_logging
from resources.gpu import GpuResource

Device = Literal["auto", "cuda", "mps", "cpu"]


@dataclass(frozen=True)
class RecipeSource:
    """Where a component's recipe is written: in its defs.yaml, or in a file of its own.

    Args:
        content: the sections of the recipe, or the path of its file.
        folder: the folder of defs.yaml: paths are relative to it.
    """

    content: Mapping[str, Any] | str
    folder: Path

    def read(self, name: str | None) -> Recipe:
        """Read the recipe; sections in defs.yaml are those of the moment when the code location was loaded.

        Args:
            name: of the recipe; if not given, the name of the file, or that of the folder of defs.yaml.

        Raises:
            BadInput: the recipe cannot be read, or is wrong.
        """
        if isinstance(self.content, str):
            recipe = load_recipe(self.folder / self.content)
            return recipe if name is None else renamed(recipe, name, str(self.folder / "defs.yaml"))
        return recipe_of(self.content, name or self.folder.name, f"{self.folder / 'defs.yaml'}: recipe")


def _source(context: dg.ResolutionContext, content: Any) -> RecipeSource:
    folder = dg.ComponentLoadContext.from_resolution_context(context).path
    content = context.resolve_value(content)
    if not isinstance(content, str | Mapping):
        raise BadInput(f"{folder / 'defs.yaml'}: recipe: must be a mapping of sections, or the path of a recipe file")
    return RecipeSource(content, folder)


class Scaffold(dg.Model):
    """What `dg scaffold defs finetune_assets.FinetuneRecipe NAME` can be told."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    dataset: str = "my_rows"


class FinetuneRecipeScaffolder(dg.Scaffolder[Scaffold]):
    """A writer of defs.yaml with the shortest recipe that can run."""

    @classmethod
    def get_scaffold_params(cls) -> type[Scaffold]:
        return Scaffold

    def scaffold(self, request: dg.ScaffoldRequest[Scaffold]) -> None:
        name = request.target_path.name
        recipe = {
            "dataset": {"dataset": [request.params.dataset]},
            "model": {"model_name_or_path": request.params.model},
            "ollama": {"name": name.lower()},
        }
        dg.scaffold_component(request, {"recipe": recipe})


@dg.scaffold_with(FinetuneRecipeScaffolder)
@dataclass
class FinetuneRecipe(dg.Component, dg.Resolvable):
    """A recipe's chain: from instruction data to a model served by Ollama, as eight assets with their job and sensors.

    Data sets, local models and `home` are folders of the Dagster project that mounts the component.
    """

    recipe: Annotated[
        RecipeSource,
        dg.Resolver(
            _source,
            # the sections are checked when they are read: a schema would say less, and refuse "a,b" for a list
            model_field_type=str | dict[str, Any],
            description="The sections of the recipe (`finetune schema` prints them), or the path of its file, relative "
            "to the folder of defs.yaml.",
            examples=["support.yaml"],
        ),
    ]
    name: Annotated[
        str | None,
        dg.Resolver.default(
            description="Name of the recipe, of its artifacts and of its job. Default: the name of the recipe file, or "
            "of the folder of defs.yaml.",
            examples=["support"],
        ),
    ] = None
    key_prefix: Annotated[
        str | Sequence[str],
        dg.Resolver.default(
            description="Parts of every asset key before the recipe's name: a list, or a text with '/' between them.",
            examples=["ml/chat"],
        ),
    ] = ()
    group_name: Annotated[
        str | None,
        dg.Resolver.default(
            description="Group of the eight assets. Default: prefix and name.", examples=["support_bot"]
        ),
    ] = None
    owners: Annotated[
        Sequence[str],
        dg.Resolver.default(
            description="E-mail addresses, or teams as team:NAME.", examples=[["team:support", "ana@example.com"]]
        ),
    ] = ()
    tags: Annotated[
        Mapping[str, str], dg.Resolver.default(description="Tags of every asset.", examples=[{"tier": "prod"}])
    ] = field(default_factory=dict)
    device: Annotated[
        Device, dg.Resolver.default(description="Where to compute. auto takes the first accelerator that is there.")
    ] = "auto"
    home: Annotated[
        str | None,
        dg.Resolver.default(
            description="Folder of artifacts, caches and the Ollama model store, relative to the Dagster project. "
            "Default: DAGSTER_HOME, else dagster_home.",
            examples=["models"],
        ),
    ] = None

    @classmethod
    def get_spec(cls) -> dg.ComponentTypeSpec:
        return dg.ComponentTypeSpec(
            owners=["team:fine-tuning"],
            tags=["fine-tuning", "llm", "ollama"],
            produces=["asset", "job", "sensor", "schedule", "resource"],
        )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        mask_logging()
        root = context.project_root.resolve()
        project, recipe = Project(root, state_folder(root, self.home)), self.read()
        _refuse_namesakes(recipe, others := _recipes(context.component_tree))
        refuse_rivals(recipe, others)
        mount = self._mount(recipe)
        return dg.Definitions.merge(
            recipe_definitions(recipe, project, mount),
            dg.Definitions(
                assets=dataset_nodes([recipe], project, mount),
                sensors=[observe_one_sensor(recipe, project, mount)],
                resources={mount.gpu: GpuResource(device=self.device)},
            ),
        )

    def read(self) -> Recipe:
        """Read the recipe as it is now.

        Raises:
            BadInput: the recipe cannot be read, or is wrong.
        """
        return self.recipe.read(self.name)

    def _mount(self, recipe: Recipe) -> Mount:
        parts = self.key_prefix.split("/") if isinstance(self.key_prefix, str) else self.key_prefix
        prefix = tuple(parts)
        return Mount(
            prefix=prefix,
            group=self.group_name,
            owners=tuple(self.owners),
            tags=self.tags,
            gpu=f"{stem(recipe.name, Mount(prefix))}_gpu",
            own_datasets=True,
            read=self.read,
        )


def _recipes(tree: dg.ComponentTree) -> list[Recipe]:
    """Return the recipes of a Dagster project's components; one that cannot be read reports that by itself."""
    recipes = []
    for component in tree.get_all_components(FinetuneRecipe):
        with contextlib.suppress(BadInput):
            recipes.append(component.read())
    return recipes


def _refuse_namesakes(recipe: Recipe, recipes: Sequence[Recipe]) -> None:
    """Refuse two recipes whose artifacts would lie in one folder.

    Raises:
        BadInput: another component's recipe has this name.
    """
    if sum(other.name == recipe.name for other in recipes) > 1:
        raise BadInput(
            f"two components of this project have a recipe named {recipe.name}: their artifacts would share a folder",
            "set the attribute name of one of them",
        )
