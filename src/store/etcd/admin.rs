//! Users and roles: for who has etcd's role `root`. Each call makes what is missing and
//! says whether it did, so that all may be repeated, by several at once.

use etcd_client::{Client, Error as EtcdError, Permission, PermissionType, UserAddOptions};

use super::explain;
use super::{Etcd, end};
use crate::error::{Context, Result};
use crate::store::secret::Secret;

/// What a role may do below a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub right: Right,
    /// Ends in `/`.
    pub prefix: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    Read,
    /// Without reading: enough to delete.
    Write,
    ReadWrite,
}

impl Grant {
    pub fn new(right: Right, prefix: String) -> Self {
        Self { right, prefix }
    }

    fn kind(&self) -> PermissionType {
        match self.right {
            Right::Read => PermissionType::Read,
            Right::Write => PermissionType::Write,
            Right::ReadWrite => PermissionType::Readwrite,
        }
    }

    fn permission(&self) -> Permission {
        Permission::new(self.kind(), self.prefix.as_str()).with_range_end(end(&self.prefix))
    }

    fn is(&self, permission: &Permission) -> bool {
        permission.get_type() == self.kind() as i32
            && permission.key() == self.prefix.as_bytes()
            && permission.range_end() == end(&self.prefix).as_bytes()
    }
}

impl Etcd {
    /// Whether etcd asks for log-ins.
    pub async fn has_authentication(&self) -> Result<bool> {
        let ask = |client: Client| async move {
            // Nobody has this name: the answer tells only whether names count.
            let mut auth = client.auth_client();
            match auth.authenticate("pavo/nobody".to_owned(), String::new()).await {
                Ok(_) => Ok(true),
                Err(error) if explain::says(&error, "authentication is not enabled") => Ok(false),
                Err(error) if explain::says(&error, "authentication failed") => Ok(true),
                Err(error) => Err(error),
            }
        };
        self.0.call(ask).await.while_doing(|| "asking etcd for its authentication".into())
    }

    /// Whether etcd takes this password.
    pub async fn accepts(&self, user: &str, password: &Secret) -> Result<bool> {
        let ask = |client: Client| async move {
            let password = password.expose().to_owned();
            match client.auth_client().authenticate(user.to_owned(), password).await {
                Ok(_) => Ok(true),
                Err(error) if explain::says(&error, "authentication failed") => Ok(false),
                Err(error) => Err(error),
            }
        };
        self.0.call(ask).await.while_doing(|| format!("logging in to etcd as `{user}`"))
    }

    /// Lets the role exist with these rights.
    pub async fn ensure_role(&self, role: &str, grants: &[Grant]) -> Result<bool> {
        self.try_ensure_role(role, grants)
            .await
            .while_doing(|| format!("making the role `{role}` of etcd"))
    }

    async fn try_ensure_role(&self, role: &str, grants: &[Grant]) -> Result<bool> {
        let get = |client: Client| async move {
            match client.auth_client().role_get(role).await {
                Err(error) if explain::says(&error, "role name not found") => Ok(None),
                outcome => outcome.map(|role| Some(role.permissions())),
            }
        };
        let found = self.0.call(get).await?;
        let mut changed = found.is_none();
        if found.is_none() {
            let add = |client: Client| async move {
                made(client.auth_client().role_add(role).await, "role name already exists")
            };
            self.0.call(add).await?;
        }
        let found = found.unwrap_or_default();
        for grant in grants.iter().filter(|grant| !found.iter().any(|p| grant.is(p))) {
            let add = |client: Client| async move {
                let permission = grant.permission();
                client.auth_client().role_grant_permission(role, permission).await.map(drop)
            };
            self.0.call(add).await?;
            changed = true;
        }
        Ok(changed)
    }

    /// Lets the user exist and have these roles. A new one gets the password, or none:
    /// then only a certificate logs it in. One that exists keeps its own.
    pub async fn ensure_user(
        &self,
        user: &str,
        password: Option<&Secret>,
        roles: &[&str],
    ) -> Result<bool> {
        self.try_ensure_user(user, password, roles)
            .await
            .while_doing(|| format!("making the user `{user}` of etcd"))
    }

    async fn try_ensure_user(
        &self,
        user: &str,
        password: Option<&Secret>,
        roles: &[&str],
    ) -> Result<bool> {
        let get = |client: Client| async move {
            match client.auth_client().user_get(user).await {
                Err(error) if explain::says(&error, "user name not found") => Ok(None),
                outcome => outcome.map(|user| Some(user.roles().to_vec())),
            }
        };
        let found = self.0.call(get).await?;
        let mut changed = found.is_none();
        if found.is_none() {
            let add = |client: Client| async move {
                let options = password.is_none().then(|| UserAddOptions::new().with_no_pwd());
                let password = password.map_or("", Secret::expose);
                let outcome = client.auth_client().user_add(user, password, options).await;
                made(outcome, "user name already exists")
            };
            self.0.call(add).await?;
        }
        let found = found.unwrap_or_default();
        for role in roles.iter().filter(|role| !found.iter().any(|found| found == *role)) {
            let grant = |client: Client| async move {
                client.auth_client().user_grant_role(user, *role).await.map(drop)
            };
            self.0.call(grant).await?;
            changed = true;
        }
        Ok(changed)
    }

    /// Takes a role from the user; one that it does not have is no error.
    pub async fn revoke_role(&self, user: &str, role: &str) -> Result<bool> {
        let revoke = |client: Client| async move {
            match client.auth_client().user_revoke_role(user, role).await {
                Err(error) if explain::says(&error, "role is not granted") => Ok(false),
                outcome => outcome.map(|_| true),
            }
        };
        let outcome = self.0.call(revoke).await;
        outcome.while_doing(|| format!("taking the role `{role}` from `{user}`"))
    }

    pub async fn set_password(&self, user: &str, password: &Secret) -> Result<()> {
        let set = |client: Client| async move {
            let password = password.expose();
            client.auth_client().user_change_password(user, password).await.map(drop)
        };
        self.0.call(set).await.while_doing(|| format!("changing the password of `{user}`"))
    }

    /// Removes the user, and the role of the same name.
    pub async fn remove_user(&self, user: &str) -> Result<bool> {
        let remove = |client: Client| async move {
            let mut auth = client.auth_client();
            let user_gone = match auth.user_delete(user).await {
                Err(error) if explain::says(&error, "user name not found") => false,
                outcome => outcome.map(|_| true)?,
            };
            match auth.role_delete(user).await {
                Err(error) if explain::says(&error, "role name not found") => Ok(user_gone),
                outcome => outcome.map(|_| true),
            }
        };
        self.0.call(remove).await.while_doing(|| format!("removing the user `{user}` of etcd"))
    }

    /// From now on everybody has to log in.
    pub async fn enable_authentication(&self) -> Result<()> {
        let enable =
            |client: Client| async move { client.auth_client().auth_enable().await.map(drop) };
        self.0.call(enable).await.while_doing(|| "enabling etcd's authentication".into())
    }

    /// Lets everybody in again.
    pub async fn disable_authentication(&self) -> Result<()> {
        let disable =
            |client: Client| async move { client.auth_client().auth_disable().await.map(drop) };
        self.0.call(disable).await.while_doing(|| "disabling etcd's authentication".into())
    }
}

/// What exists already is made.
fn made<T>(outcome: Result<T, EtcdError>, exists: &str) -> Result<(), EtcdError> {
    match outcome {
        Err(error) if explain::says(&error, exists) => Ok(()),
        outcome => outcome.map(drop),
    }
}
