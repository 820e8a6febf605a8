//! `vzpkg`: OS templates and their caches.

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};
use node::{
    api::{Failure, Request, TemplateRequest},
    template::{Cache, Listed},
};

use crate::talk::{self, Common};

/// Manages OS templates and their caches.
#[derive(Debug, Parser)]
#[command(name = "vzpkg", version)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the templates.
    List {
        /// Only those with a cache.
        #[arg(long)]
        cache: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Build a template's cache if it is missing.
    Create {
        #[command(subcommand)]
        what: What,
    },
    /// Build a template's cache from the packages of today.
    Update {
        #[command(subcommand)]
        what: What,
    },
    /// Forget a template's cache.
    Remove {
        #[command(subcommand)]
        what: What,
    },
}

#[derive(Debug, Subcommand)]
enum What {
    /// The cache of a template.
    Cache {
        /// The template.
        name: String,
    },
}

pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    match talk::parse::<Arguments>(arguments) {
        Ok(arguments) => talk::end(execute(arguments)),
        Err(code) => code,
    }
}

fn execute(arguments: Arguments) -> Result<u8, Failure> {
    let Arguments { common, command } = arguments;
    let built = |name: &str, request| -> Result<(), Failure> {
        let cache: Cache = common.call(&Request::Template(request))?;
        talk::print(&format!("{name} is cached as {} ({})", cache.digest, size(cache.size_bytes)));
        Ok(())
    };
    match command {
        Command::List { cache, json } => {
            let request = Request::Template(TemplateRequest::List);
            let mut listed: Vec<Listed> = common.call(&request)?;
            listed.retain(|template| !cache || template.cache.is_some());
            if json {
                talk::print(&serde_json::json!(listed).to_string());
                return Ok(0);
            }
            for template in listed {
                let cached = template.cache.map_or("-".to_owned(), |it| size(it.size_bytes));
                let Listed { name, description, .. } = template;
                talk::print(&format!("{name:<24} {cached:>10}  {description}"));
            }
        }
        Command::Create { what: What::Cache { name } } => {
            built(&name, TemplateRequest::Create(name.clone()))?;
        }
        Command::Update { what: What::Cache { name } } => {
            built(&name, TemplateRequest::Update(name.clone()))?;
        }
        Command::Remove { what: What::Cache { name } } => {
            common.call::<()>(&Request::Template(TemplateRequest::Remove(name.clone())))?;
            talk::print(&format!("the cache of {name} was removed"));
        }
    }
    Ok(0)
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
