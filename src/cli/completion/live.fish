
# Names that change with time: of VMs, clusters, templates, images.
function __pavo_live
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    command $words[1] internal complete -- $words[2..-1] "$current" 2>/dev/null
end
complete -c pavo -a '(__pavo_live)'
complete -c pavo -n 'not __fish_use_subcommand' -s j -l jobid -x -a '(__pavo_live)'
complete -c pavo -n 'not __fish_use_subcommand' -s J -l jobname -x -a '(__pavo_live)'
