"""Before anything goes to the Hub: a repository's name is legal, and the token may write there."""

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id

from ..models._download import check_token, retry


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError, in one line, where `repo_id` is not a legal ORG/NAME."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error)) from error
    if repo_id.count("/") != 1:
        raise ValueError(f"a repository is named ORG/NAME, got {repo_id!r}")


def check_destination(repo_id: str, create_pr: bool = False) -> None:
    """Check that the token may write to a repository, which need not exist yet.

    Args:
        repo_id: ORG/NAME.
        create_pr: Only a pull request is opened; any token that can write may do that.

    Raises:
        ValueError: the name is not legal.
        PermissionError: there is no token, the Hub does not accept it, or it may not write there.
        FileNotFoundError: a pull request needs a repository that exists.
        ConnectionError: the Hub cannot be reached.
        HfHubHTTPError: it refuses for another reason, or stays busy.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise PermissionError("no token for the Hub: set HF_TOKEN or run `hf auth login`")
    try:
        me = retry(HfApi().whoami)
    except HfHubHTTPError as error:
        check_token(error)
        raise
    except httpx.TransportError as error:
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} cannot be reached: {error}") from error
    token = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(f"the token of {me['name']} can only read; make one that can write")
    if create_pr:
        if not retry(HfApi().repo_exists, repo_id):
            raise FileNotFoundError(f"there is no repository {repo_id} to open a pull request for")
        return
    owner = repo_id.partition("/")[0]
    roles = {me["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if owner not in roles:
        raise PermissionError(f"{me['name']} may not write to {repo_id}; only to {', '.join(roles)}")
    scoped = token.get("fineGrained", {}).get("scoped")
    writable = scoped is None or any(
        "repo.write" in scope.get("permissions", ()) and scope.get("entity", {}).get("name") in (owner, repo_id)
        for scope in scoped
    )
    if roles[owner] == "read" or not writable:
        raise PermissionError(f"the token of {me['name']} may read {repo_id}, but not write to it")
